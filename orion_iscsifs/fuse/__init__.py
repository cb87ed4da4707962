"""The file system: block devices in, one device file each out. Knows nothing of iSCSI.

One request of the kernel becomes one call of a `BlockDevice`, one exception one errno. The only
package that imports pyfuse3.
"""
