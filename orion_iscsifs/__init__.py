"""Mount an iSCSI target through FUSE and use each LUN as one device file."""

__version__ = "0.1.0"
