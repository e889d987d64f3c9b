"""What moves bytes between memories and the device: the fetch engine, loads and stores."""
