"""Scripts: absl flags in, one call into dsjax. No logic lives here."""
