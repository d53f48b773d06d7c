"""A tiny model of every transformer class of diffusers, by the name of the class."""

from zoo.classes import audio, images, joint, joint_videos, rows, videos
from zoo.kind import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind for part in (images, joint, rows, videos, joint_videos, audio) for kind in part.KINDS
}
