"""Public question sets we know: one short file each, found by name through ``known.find_task``. No question is here."""
