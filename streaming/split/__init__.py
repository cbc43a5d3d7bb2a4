"""Which device runs which block, and whether devices with idle links bring weights to another one."""
