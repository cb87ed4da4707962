"""ADDITIONAL SENSE CODE and its QUALIFIER in words (SPC-4 annex F.2, as far as disks use them).

Every pair has words: what is not in the table is named by its family, or as the vendor's own.
"""

from collections.abc import Mapping
from functools import cache
from typing import Final

_VENDOR: Final = 0x80
"""Codes and qualifiers from here on are the vendor's."""
_COMPONENT_FAILED: Final = 0x40
"""With a qualifier of 80h to FFh: which component has failed its diagnostics."""


def words(asc: int, ascq: int) -> str:
    """`logical unit not ready, becoming ready` for 04h/01h."""
    if asc >= _VENDOR:
        return "a condition of the vendor's own"
    family, codes = _parsed(asc)
    found = codes.get(ascq)
    if found is not None:
        # Many say all by themselves; the others are read after their family.
        return found if asc not in _READ_AFTER_FAMILY or found == family else f"{family}, {found}"
    if asc == _COMPONENT_FAILED and ascq >= _VENDOR:
        return f"diagnostic failure on component {ascq:02X}h"
    if ascq >= _VENDOR:
        return f"{family}, the vendor's own qualifier"
    return f"{family}, unassigned qualifier" if asc in _TABLE else family


_READ_AFTER_FAMILY: Final = frozenset({0x04, 0x0C, 0x11, 0x17, 0x18, 0x19, 0x28, 0x2F})


@cache
def _parsed(asc: int) -> tuple[str, Mapping[int, str]]:
    """The family and the words of each qualifier."""
    family, _, codes = _TABLE.get(asc, "unassigned additional sense code").partition(" | ")
    entries = (entry.split(" ", 1) for entry in codes.split("; ") if entry)
    return family, {int(ascq, 16): text for ascq, text in entries}


_TABLE: Final[Mapping[int, str]] = {
    0x00: (
        "no additional sense information | 00 no additional sense information; 06 I/O process "
        "terminated; 16 operation in progress; 17 cleaning requested; 1D pass-through information"
        " available; 1E conflicting SA creation request; 1F transition to another power condition"
    ),
    0x01: "index or sector signal | 00 no index or sector signal",
    0x02: "seek | 00 no seek complete",
    0x03: "peripheral device write fault | 00 peripheral device write fault",
    0x04: (
        "logical unit not ready | 00 cause not reportable; 01 becoming ready; 02 start command "
        "needed; 03 manual intervention needed; 04 format in progress; 05 rebuild in progress; 06"
        " recalculation in progress; 07 operation in progress; 09 self-test in progress; 0A "
        "asymmetric access state transition; 0B target port in standby state; 0C target port in "
        "unavailable state; 0D structure check needed; 0E security session in progress; 10 "
        "auxiliary memory not accessible; 11 notify (enable spinup) needed; 13 SA creation in "
        "progress; 14 space allocation in progress; 1A start stop unit command in progress; 1B "
        "sanitize in progress; 1C additional power use not yet granted; 1D configuration in "
        "progress; 1E microcode activation needed; 1F microcode download needed; 20 reset needed;"
        " 21 hard reset needed; 22 power cycle needed; 23 affiliation needed; 24 depopulation in "
        "progress; 25 depopulation restoration in progress"
    ),
    0x05: "selection | 00 logical unit does not respond to selection",
    0x06: "reference position | 00 no reference position found",
    0x07: "peripheral devices | 00 multiple peripheral devices selected",
    0x08: (
        "logical unit communication | 00 logical unit communication failure; 01 logical unit "
        "communication time-out; 02 logical unit communication parity error; 03 logical unit "
        "communication CRC error (Ultra-DMA); 04 unreachable copy target"
    ),
    0x09: (
        "servo or tracking | 00 track following error; 04 head select fault; 05 vibration induced"
        " tracking error"
    ),
    0x0A: "error log | 00 error log overflow",
    0x0B: (
        "warning | 00 warning; 01 specified temperature exceeded; 02 enclosure degraded; 03 "
        "background self-test failed; 04 background pre-scan found a medium error; 05 background "
        "medium scan found a medium error; 06 non-volatile cache is now volatile; 07 degraded "
        "power to the non-volatile cache; 08 power loss expected; 09 device statistics "
        "notification active; 0A high critical temperature limit exceeded; 0B low critical "
        "temperature limit exceeded; 0C high operating temperature limit exceeded; 0D low "
        "operating temperature limit exceeded; 0E high critical humidity limit exceeded; 0F low "
        "critical humidity limit exceeded; 10 high operating humidity limit exceeded; 11 low "
        "operating humidity limit exceeded; 12 microcode security at risk; 13 microcode digital "
        "signature validation failure; 14 physical element status change"
    ),
    0x0C: (
        "write error | 00 write error; 01 recovered by reallocation; 02 reallocation failed; 03 "
        "reassignment recommended; 04 compression check miscompare; 05 data expansion during "
        "compression; 06 block not compressible; 07 recovery needed; 08 recovery failed; 0B "
        "auxiliary memory write error; 0C unexpected unsolicited data; 0D not enough unsolicited "
        "data; 0E multiple write errors; 0F defects in the error window; 10 incomplete multiple "
        "atomic write operations; 11 recovery scan needed; 12 insufficient zone resources"
    ),
    0x0D: (
        "error of a copy target device | 00 temporary initiator error of a copy; 01 third party "
        "device failure; 02 copy target device not reachable; 03 incorrect copy target device "
        "type; 04 data underrun at the copy target; 05 data overrun at the copy target"
    ),
    0x0E: (
        "invalid information unit | 00 invalid information unit; 01 information unit too short; "
        "02 information unit too long; 03 invalid field in the command information unit"
    ),
    0x10: (
        "protection information or ECC | 00 CRC or ECC error in the ID field; 01 logical block "
        "guard check failed; 02 logical block application tag check failed; 03 logical block "
        "reference tag check failed; 05 protection error on a buffered block"
    ),
    0x11: (
        "unrecovered read error | 00 unrecovered read error; 01 retries exhausted; 02 error too "
        "long to correct; 03 multiple read errors; 04 automatic reallocation failed; 05 "
        "uncorrectable layered ECC; 06 uncorrectable circumvented error; 07 data "
        "resynchronization error; 0A miscorrected error; 0B reassignment recommended; 0C rewrite "
        "recommended; 0D decompression CRC error; 0E can't decompress with the declared "
        "algorithm; 12 auxiliary memory read error; 13 retransmission request was not served; 14 "
        "block marked bad by the application client; 15 write after sanitize needed"
    ),
    0x12: "address mark | 00 address mark not found for the ID field",
    0x13: "address mark | 00 address mark not found for the data field",
    0x14: (
        "recorded entity | 00 recorded entity not found; 01 record not found; 05 record not "
        "found, reassignment recommended; 06 record not found, data reallocated"
    ),
    0x15: (
        "positioning error | 00 random positioning error; 01 mechanical positioning error; 02 "
        "positioning error found by reading the medium"
    ),
    0x16: (
        "data synchronization mark | 00 data synchronization mark error; 01 data rewritten; 02 "
        "rewrite recommended; 03 data reallocated; 04 reassignment recommended"
    ),
    0x17: (
        "data recovered without error correction | 00 no error correction applied; 01 with "
        "retries; 02 with positive head offset; 03 with negative head offset; 05 with the "
        "previous sector ID; 06 data reallocated; 07 reassignment recommended; 08 rewrite "
        "recommended; 09 data rewritten"
    ),
    0x18: (
        "data recovered with error correction | 00 error correction applied; 01 and retries; 02 "
        "data reallocated; 05 reassignment recommended; 06 rewrite recommended; 07 data rewritten"
    ),
    0x19: (
        "defect list | 00 error; 01 not available; 02 error in the primary list; 03 error in the "
        "grown list"
    ),
    0x1A: "parameter list length | 00 parameter list length error",
    0x1B: "synchronous data transfer | 00 synchronous data transfer error",
    0x1C: (
        "defect list | 00 defect list not found; 01 primary defect list not found; 02 grown "
        "defect list not found"
    ),
    0x1D: (
        "miscompare during verify operation | 00 miscompare during verify operation; 01 "
        "miscompare verify of unmapped blocks"
    ),
    0x1E: "ID recovered | 00 recovered ID with ECC correction",
    0x1F: "defect list transfer | 00 partial defect list transfer",
    0x20: (
        "invalid command operation code | 00 invalid command operation code; 01 access denied, "
        "initiator pending enrollment; 02 access denied, no access rights; 03 access denied, "
        "invalid management key; 08 access denied, enrollment conflict; 09 access denied, invalid"
        " logical unit identifier; 0A access denied, invalid proxy token; 0B access denied, "
        "access control conflict; 0C illegal command in explicit address mode"
    ),
    0x21: (
        "logical block address out of range | 00 logical block address out of range; 01 invalid "
        "element address; 04 unaligned write command; 05 write boundary violation; 06 attempt to "
        "read invalid data; 07 read boundary violation; 08 misaligned write command"
    ),
    0x22: "illegal function | 00 illegal function",
    0x23: (
        "token operation | 00 invalid token operation, cause not reportable; 01 unsupported token"
        " type; 02 remote token use not supported; 03 remote token creation not supported; 04 "
        "token unknown; 05 token corrupt; 06 token revoked; 07 token expired; 08 token cancelled;"
        " 09 token deleted; 0A invalid token length"
    ),
    0x24: (
        "invalid field in CDB | 00 invalid field in CDB; 01 CDB decryption error; 04 security "
        "audit value frozen; 05 security working key frozen; 06 nonce not unique; 07 nonce "
        "timestamp out of range; 08 invalid XCDB; 09 invalid fast format"
    ),
    0x25: "logical unit not supported | 00 logical unit not supported",
    0x26: (
        "invalid field in parameter list | 00 invalid field in parameter list; 01 parameter not "
        "supported; 02 parameter value invalid; 03 threshold parameters not supported; 04 invalid"
        " release of a persistent reservation; 05 data decryption error; 06 too many target "
        "descriptors; 07 unsupported target descriptor type; 08 too many segment descriptors; 09 "
        "unsupported segment descriptor type; 0A unexpected inexact segment; 0B inline data "
        "length exceeded; 0C invalid operation for the copy source or destination; 0D copy "
        "segment granularity violation; 0E invalid parameter while the port is enabled; 0F "
        "invalid data-out buffer integrity check value; 10 data decryption key fail limit "
        "reached; 11 incomplete key-associated data set; 12 vendor specific key reference not "
        "found; 13 application tag mode page is invalid; 14 tape stream mirroring prevented; 15 "
        "copy source or copy destination not authorized"
    ),
    0x27: (
        "write protected | 00 write protected; 01 hardware write protected; 02 logical unit "
        "software write protected; 03 associated write protect; 04 persistent write protect; 05 "
        "permanent write protect; 06 conditional write protect; 07 space allocation failed; 08 "
        "zone is read only"
    ),
    0x28: (
        "not ready to ready change | 00 medium may have changed; 02 format layer may have changed"
    ),
    0x29: (
        "power on or reset | 00 power on, reset, or bus device reset occurred; 01 power on "
        "occurred; 02 bus reset occurred; 03 logical unit reset occurred; 04 device internal "
        "reset; 05 transceiver mode changed to single-ended; 06 transceiver mode changed to LVD; "
        "07 I_T nexus loss occurred"
    ),
    0x2A: (
        "parameters changed | 00 parameters changed; 01 mode parameters changed; 02 log "
        "parameters changed; 03 reservations preempted; 04 reservations released; 05 "
        "registrations preempted; 06 asymmetric access state changed; 07 implicit asymmetric "
        "access state transition failed; 08 priority changed; 09 capacity data has changed; 0A "
        "error history I_T nexus cleared; 0B error history snapshot released; 0C error recovery "
        "attributes have changed; 0D data encryption capabilities changed; 10 timestamp changed; "
        "14 SA creation capabilities data has changed; 15 medium removal prevention preempted; 16"
        " zone reset write pointer recommended"
    ),
    0x2B: "copy | 00 copy can't execute since the host can't disconnect",
    0x2C: (
        "command sequence error | 00 command sequence error; 05 illegal power condition request; "
        "07 previous busy status; 08 previous task set full status; 09 previous reservation "
        "conflict status; 0B not reserved; 0C ORWRITE generation does not match; 0D reset write "
        "pointer not allowed; 0E zone is offline; 0F stream not open; 10 unwritten data in zone; "
        "11 descriptor format sense data needed"
    ),
    0x2E: (
        "insufficient time for operation | 00 insufficient time for operation; 01 command "
        "time-out before processing; 02 command time-out during processing; 03 command time-out "
        "during processing due to error recovery"
    ),
    0x2F: (
        "commands cleared | 00 by another initiator; 01 by power loss notification; 02 by the "
        "device server; 03 some of them, by a queuing layer event"
    ),
    0x30: (
        "incompatible medium | 00 incompatible medium installed; 01 unknown format; 02 "
        "incompatible format; 06 can't format the medium"
    ),
    0x31: (
        "medium format corrupted | 00 medium format corrupted; 01 format command failed; 03 "
        "sanitize command failed; 04 depopulation failed; 05 depopulation restoration failed"
    ),
    0x32: (
        "defect spare location | 00 no defect spare location available; 01 defect list update "
        "failure"
    ),
    0x34: "enclosure | 00 enclosure failure",
    0x35: (
        "enclosure services | 00 enclosure services failure; 01 unsupported enclosure function; "
        "02 enclosure services unavailable; 03 enclosure services transfer failure; 04 enclosure "
        "services transfer refused; 05 enclosure services checksum error"
    ),
    0x37: "rounded parameter | 00 rounded parameter",
    0x38: "event status notification | 07 thin provisioning soft threshold reached",
    0x39: "saving parameters | 00 saving parameters not supported",
    0x3A: (
        "medium not present | 00 medium not present; 01 tray closed; 02 tray open; 03 loadable; "
        "04 auxiliary memory accessible"
    ),
    0x3B: "position | 00 sequential positioning error; 17 element status unknown",
    0x3D: "identify message | 00 invalid bits in the identify message",
    0x3E: (
        "logical unit configuration | 00 logical unit has not self-configured yet; 01 logical "
        "unit failure; 02 time-out on logical unit; 03 logical unit failed self-test; 04 logical "
        "unit unable to update the self-test log"
    ),
    0x3F: (
        "target operating conditions have changed | 00 target operating conditions have changed; "
        "01 microcode has been changed; 02 changed operating definition; 03 inquiry data has "
        "changed; 04 component device attached; 05 device identifier changed; 06 redundancy group"
        " created or modified; 07 redundancy group deleted; 08 spare created or modified; 09 "
        "spare deleted; 0A volume set created or modified; 0B volume set deleted; 0C volume set "
        "deassigned; 0D volume set reassigned; 0E reported LUNs data has changed; 0F echo buffer "
        "overwritten; 10 medium loadable; 11 medium auxiliary memory accessible; 12 iSCSI IP "
        "address added; 13 iSCSI IP address removed; 14 iSCSI IP address changed; 15 inspect "
        "referrals sense descriptors; 16 microcode has been changed without reset; 17 zone "
        "transition to full; 18 bind completed; 19 bind redirected; 1A subsidiary binding changed"
    ),
    0x40: "diagnostic failure | 00 RAM failure",
    0x41: "data path | 00 data path failure",
    0x42: "power-on or self-test | 00 power-on or self-test failure",
    0x43: "message error | 00 message error",
    0x44: (
        "internal target failure | 00 internal target failure; 01 persistent reservation "
        "information lost; 71 ATA device failed SET FEATURES"
    ),
    0x45: "select or reselect | 00 select or reselect failure",
    0x46: "soft reset | 00 unsuccessful soft reset",
    0x47: (
        "transport | 00 SCSI parity error; 01 data phase CRC error; 02 SCSI parity error during "
        "status; 03 information unit CRC error; 04 asynchronous information protection error; 05 "
        "protocol service CRC error; 06 PHY test function in progress; 7F some commands cleared "
        "by iSCSI protocol event"
    ),
    0x48: "initiator detected error | 00 initiator detected error message received",
    0x49: "invalid message | 00 invalid message",
    0x4A: "command phase | 00 command phase error",
    0x4B: (
        "data phase | 00 data phase error; 01 invalid target port transfer tag; 02 too much write"
        " data; 03 ACK/NAK time-out; 04 NAK received; 05 data offset error; 06 initiator response"
        " time-out; 07 connection lost; 08 data-in buffer overflow, data buffer size; 09 data-in "
        "buffer overflow, data buffer descriptor area; 0A data-in buffer error; 0B data-out "
        "buffer overflow, data buffer size; 0C data-out buffer overflow, data buffer descriptor "
        "area; 0D data-out buffer error; 0E PCIe fabric error; 0F PCIe completion time-out; 10 "
        "PCIe completer abort; 11 PCIe poisoned TLP received; 12 PCIe ECRC check failed; 13 PCIe "
        "unsupported request; 14 PCIe ACS violation; 15 PCIe TLP prefix blocked"
    ),
    0x4C: "self-configuration | 00 logical unit failed self-configuration",
    0x4D: "overlapped commands | 00 tagged overlapped commands",
    0x4E: "overlapped commands | 00 overlapped commands attempted",
    0x53: "medium load or removal | 00 media load or eject failed; 02 medium removal prevented",
    0x54: "interface to the target system | 00 SCSI to host system interface failure",
    0x55: (
        "system resource | 00 system resource failure; 01 system buffer full; 02 insufficient "
        "reservation resources; 03 insufficient resources; 04 insufficient registration "
        "resources; 05 insufficient access control resources; 06 auxiliary memory out of space; "
        "08 maximum number of supplemental decryption keys exceeded; 0B insufficient power for "
        "the operation; 0C insufficient resources to create a ROD; 0D insufficient resources to "
        "create a ROD token; 0E insufficient zone resources; 0F insufficient zone resources to "
        "complete the write; 10 maximum number of streams open; 11 insufficient resources to bind"
    ),
    0x59: "updated block | 00 updated block read",
    0x5A: (
        "operator request | 00 operator request or state change input; 01 operator medium removal"
        " request; 02 operator selected write protect; 03 operator selected write permit"
    ),
    0x5B: (
        "log | 00 log exception; 01 threshold condition met; 02 log counter at maximum; 03 log "
        "list codes exhausted"
    ),
    0x5C: (
        "spindle synchronization | 00 spindle synchronization status changed; 01 spindles "
        "synchronized; 02 spindles not synchronized"
    ),
    0x5D: (
        "failure prediction | 00 failure prediction threshold exceeded; FF failure prediction "
        "threshold exceeded (false)"
    ),
    0x5E: (
        "power condition | 00 low power condition on; 01 idle condition by timer; 02 standby "
        "condition by timer; 03 idle condition by command; 04 standby condition by command; 41 "
        "power state change to active; 42 power state change to idle; 43 power state change to "
        "standby; 45 power state change to sleep; 47 power state change to device control"
    ),
    0x65: "voltage | 00 voltage fault",
    0x67: (
        "logical unit access | 00 configuration failure; 01 configuration of incapable logical "
        "units failed; 02 add logical unit failed; 03 modification of logical unit failed; 04 "
        "exchange of logical unit failed; 05 remove of logical unit failed; 06 attachment of "
        "logical unit failed; 07 creation of logical unit failed; 08 assign failure occurred; 09 "
        "multiply assigned logical unit; 0A set target port groups command failed; 0B ATA device "
        "feature not enabled; 0C command rejected; 0D explicit bind not allowed"
    ),
    0x68: (
        "logical unit configuration | 00 logical unit not configured; 01 subsidiary logical unit "
        "not configured"
    ),
    0x69: (
        "data loss on logical unit | 00 data loss on logical unit; 01 multiple logical unit "
        "failures; 02 parity or data mismatch"
    ),
    0x6A: "informational | 00 informational, refer to log",
    0x6B: (
        "state change | 00 state change has occurred; 01 redundancy level got better; 02 "
        "redundancy level got worse"
    ),
    0x6C: "rebuild | 00 rebuild failure occurred",
    0x6D: "recalculate | 00 recalculate failure occurred",
    0x6E: "command to logical unit failed | 00 command to logical unit failed",
    0x74: (
        "security | 00 security error; 08 invalid SA usage; 30 SA creation parameter value "
        "invalid; 40 SA creation parameter value rejected; 6F external data encryption control "
        "error; 71 logical unit access not authorized; 79 security conflict in translated device"
    ),
}
