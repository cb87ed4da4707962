"""The RAM block cache: write-back or write-through, with readahead, in 64 KiB frames."""
