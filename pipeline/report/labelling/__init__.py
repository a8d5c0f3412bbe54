"""A page of images with a choice of class for each, whose answers it saves as a table."""
