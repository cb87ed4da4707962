"""Several paths to one logical unit, joined to one block device.

* `paths`: the states of a path, as a table; what is known of each.
* `policy`: which path takes a request, and when I/O goes back to a better one.
* `path`: what a path has to offer (`Path`); the stack makes it from a session and a disk.
* `device`: `MultipathDevice`, which sends each request down a path, and again down another.
* `checker`: looks after the paths that carry nothing.
"""

from orion_iscsifs.multipath.device import MultipathDevice
from orion_iscsifs.multipath.path import Access, Path

__all__ = ["Access", "MultipathDevice", "Path"]
