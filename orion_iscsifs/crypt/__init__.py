"""LUKS volumes on a LUN: what the target gets to see is ciphertext, its header included.

Pure: `xts` (sectors), `kdf` and `antiforensic` (what a key slot is made of), `volume` (what both
versions have in common), `luks1` and `luks2` with `metadata` (the two formats), `signatures` (what
else may be on a disk). They wait for nothing: `headers` reads and writes, `keys` has what costs
time, `manage` makes and changes volumes, and `device` is the layer of the data path.
"""
