"""The product through its command line, with other people's targets, tools and file systems."""
