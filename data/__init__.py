"""What makes data: records, worlds, converters, cue writing and its audit, the tiny checkpoint."""
