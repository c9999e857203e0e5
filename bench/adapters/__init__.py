"""What makes a library run a case. Problems and layers do without torchrnn, which may be any checkout's."""
