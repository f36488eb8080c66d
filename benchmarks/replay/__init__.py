"""What benchmarks/online.py is made of: streams of requests, their truth, a server that answers them, and its parts."""
