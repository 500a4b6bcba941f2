"""What a detector costs and what it looks at: FLOPs, parameters, time, memory, attention."""
