"""What is drawn for an image, and what is done to its pixels."""
