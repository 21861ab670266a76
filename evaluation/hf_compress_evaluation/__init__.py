"""Quality, agreement with the teacher, size, latency; and the demo that measures all of them."""
