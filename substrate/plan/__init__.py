"""What a training job needs before it is started: memory, arithmetic and traffic of every layout. No torch."""
