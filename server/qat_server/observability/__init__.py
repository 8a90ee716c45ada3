"""What the server shows of itself: readiness, /status and metrics, and the HTTP server that answers with them.

All of them are functions of one immutable State, which the composition fills from what the other rooms report.
Nothing here changes a device or the kubelet's view.
"""
