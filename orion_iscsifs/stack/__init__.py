"""The whole data path of a mount, from the sessions at the bottom to the device files at the top.

    AlignedDevice         byte ranges → logical blocks
      WritebackCache      RAM block cache (not with cache=none)
        LunDevice         SCSI commands, one logical unit
          Session         iSCSI to one target

* `opening`: `open_stack`, which finds the targets and their portals and opens everything.
* `target`: one target: its paths (a session each) and its LUNs, and what changes in both.
* `unit`: one LUN: the layers above it, and its end.
* `lifetime`: things that are opened in any order and closed in any order.
* `status`: what `status --json` shows of all that.

When it ends, caches are flushed first, then the sessions log out.
"""

from orion_iscsifs.stack.mounted import Stack
from orion_iscsifs.stack.opening import open_stack

__all__ = ["Stack", "open_stack"]
