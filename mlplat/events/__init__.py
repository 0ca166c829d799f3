"""What happens in the registry, for those outside: a log that is read by cursors."""
