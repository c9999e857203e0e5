"""What makes a library run a case. Nothing here needs more of torchrnn than a case asks for."""
