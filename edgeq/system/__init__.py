"""Files, the cache, child processes, environments and the host: what every stage stands on."""
