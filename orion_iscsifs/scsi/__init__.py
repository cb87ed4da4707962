"""SCSI without I/O, both roles: what an initiator builds and decodes, a target parses and encodes.

* `cdb`: command descriptor blocks (SPC-4, SBC-3).
* `sense`: status bytes and sense data; `verdict`: what an initiator does about them.
* `inquiry`, `capacity`, `mode`, `lun`, `provisioning`: parameter data of the commands of a disk.
* `alua`: target port groups, their states, and where a path goes.

Bytes of the peer are hostile: a decoder takes what is there, fills the rest with zeroes, and
raises `MalformedData` where no sensible default exists. It never raises anything else.
"""
