"""What ``python -m vimfast.check_data`` finds in a folder of images or of shards."""
