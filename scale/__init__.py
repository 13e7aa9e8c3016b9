"""What a run needs beyond the method: fast decoder, optimizer, saving, sharding, memory plan."""
