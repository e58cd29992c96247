"""Programs of several tasks: sessions on servers, silent and lost peers, synchronous replicas."""
