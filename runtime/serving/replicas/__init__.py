"""Several replicas of one server: one process each, with a front that knows which conversation belongs to which."""
