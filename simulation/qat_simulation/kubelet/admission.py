"""How the kubelet does not admit a pod: it refuses it, or falls over."""


class AdmissionError(Exception):
    """The pod is refused; the text is what its status would show."""


class TopologyAffinityError(AdmissionError):
    """The topology policy refuses what the devices could give."""


class KubeletPanicError(Exception):
    """The real kubelet would have crashed here."""
