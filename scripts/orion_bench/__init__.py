"""This project's mount and qemu-storage-daemon's FUSE export of the same LUN, side by side."""
