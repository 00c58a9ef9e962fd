"""The shard format, and the conversion of a folder of images into it. Imports neither torch nor DALI."""
