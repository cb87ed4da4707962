"""Tests of orion_iscsifs.scsi."""
