"""Tests of orion_iscsifs.target."""
