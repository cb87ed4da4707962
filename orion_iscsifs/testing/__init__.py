"""The shipped test kit: devices in memory, scripted faults, and the contract as tests."""
