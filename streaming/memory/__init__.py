"""Where weights come from: files, master copies in page-locked RAM, and copies that stay on the device."""
