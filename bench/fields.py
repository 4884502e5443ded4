"""How long the receptive fields of all taps of a network take (of which a scan and a second pass need one each)."""

from __future__ import annotations

from common import arguments, finish, median, seconds
from maxact.fields import of_taps
from maxact.find import find_taps
from maxact.models import load_model

NETWORKS = "vgg16,resnet50,mobilenet_v2,googlenet,densenet121,efficientnet_v2_l"


def main() -> None:
    """Measures and reports."""
    args = arguments(__doc__ or "", models=NETWORKS, rounds=3)
    rows = []
    for name in args.models.split(","):
        model = load_model(name, weights="none")
        taps, crop = find_taps(model).taps, model.preprocess.crop
        times = [seconds(lambda: of_taps(model.network, taps, crop)) for _ in range(args.rounds)]  # noqa: B023
        rows.append((name, len(taps), crop[0], median(times), max(times)))
    finish("fields", ("network", "taps", "input pixels", "seconds", "slowest"), rows, {}, args.json)


if __name__ == "__main__":
    main()
