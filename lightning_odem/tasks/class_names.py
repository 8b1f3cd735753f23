"""Names of classes for CLIP's text tower.

This module lists class names only if torchvision has none, or if they differ from those in the heads with which the
published vision towers were fine-tuned. (That is why CIFAR-100 has underscores, and "cra" for crab.) They are in the
order of torchvision's labels.
"""

_DIGITS = list("0123456789")
_SIGN = "red and white triangle"
_LIMIT = "red and white circle {} kph speed limit"

CLASS_NAMES: dict[str, list[str]] = {
    "eurosat": [
        "annual crop land",
        "forest",
        "brushland or shrubland",
        "highway or road",
        "industrial buildings or commercial buildings",
        "pasture land",
        "permanent crop land",
        "residential buildings or homes or apartments",
        "river",
        "lake or sea",
    ],
    "svhn": _DIGITS,
    "gtsrb": [
        *(_LIMIT.format(speed) for speed in (20, 30, 50, 60, 70, 80)),
        "end / de-restriction of 80 kph speed limit",
        *(_LIMIT.format(speed) for speed in (100, 120)),
        "red and white circle red car and black car no passing",
        "red and white circle red truck and black car no passing",
        f"{_SIGN} road intersection warning",
        "white and yellow diamond priority road",
        "red and white upside down triangle yield right-of-way",
        "stop",
        "empty red and white circle",
        "red and white circle no truck entry",
        "red circle with white horizonal stripe no entry",
        f"{_SIGN} with exclamation mark warning",
        *(f"{_SIGN} with black {curve} curve approaching warning" for curve in ("left", "right", "double")),
        f"{_SIGN} rough / bumpy road warning",
        f"{_SIGN} car skidding / slipping warning",
        f"{_SIGN} with merging / narrow lanes warning",
        f"{_SIGN} with person digging / construction / road work warning",
        f"{_SIGN} with traffic light approaching warning",
        f"{_SIGN} with person walking warning",
        f"{_SIGN} with child and person walking warning",
        f"{_SIGN} with bicyle warning",
        f"{_SIGN} with snowflake / ice warning",
        f"{_SIGN} with deer warning",
        "white circle with gray strike bar no speed limit",
        *(
            f"blue circle with white {direction} arrow mandatory"
            for direction in (
                "right turn",
                "left turn",
                "forward",
                "forward or right turn",
                "forward or left turn",
                "keep right",
                "keep left",
            )
        ),
        "blue circle with white arrows indicating a traffic circle",
        "white circle with gray strike bar indicating no passing for cars has ended",
        "white circle with gray strike bar indicating no passing for trucks has ended",
    ],
    "mnist": _DIGITS,
    "pcam": ["lymph node", "lymph node containing metastatic tumor tissue"],
    "fer2013": ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"],
    "oxford-iiit-pet": (  # noqa: SIM905 (a name per line would be long and no easier to read)
        "abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle bengal birman bombay boxer "
        "british_shorthair chihuahua egyptian_mau english_cocker_spaniel english_setter german_shorthaired "
        "great_pyrenees havanese japanese_chin keeshond leonberger maine_coon miniature_pinscher newfoundland persian "
        "pomeranian pug ragdoll russian_blue saint_bernard samoyed scottish_terrier shiba_inu siamese sphynx "
        "staffordshire_bull_terrier wheaten_terrier yorkshire_terrier"
    ).split(),
    "cifar100": (  # noqa: SIM905
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch cra crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ).split(),
    "fashion_mnist": [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
    "emnist_letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "kmnist": list("おきすつなはまやれを"),
}
"""Names of the classes by task."""
