"""The benchmark: sse-trio beside other servers, on this machine, with one load client. See README.md."""
