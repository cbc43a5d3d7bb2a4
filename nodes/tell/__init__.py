"""What people are told: log lines, text on nodes, notices, a bar while weights are read."""
