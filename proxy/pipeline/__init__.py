"""The steps of the trip. No step knows another: `proxy/gateway.py` puts them in order."""
