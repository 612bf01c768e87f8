"""Folders of films as samples."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.data import DataConfig
from ..extras import optional_module
from ..modality.video import EXTRA, Video
from ..spec import SampleSpec
from .base import SampleSet
from .media import class_files, mostly, read_all
from .memory import check_fits, limit_bytes, memory_set
from .streaming import Source, StreamingSet
from .video_files import DEMUXERS, Clip, Film, clips_of, probe, read_clips

logger = logging.getLogger(__name__)

SHORTER = ", or take fewer --frames or a smaller --video-size"


def is_video_folder(name: str) -> bool:
    """Whether a folder of that name has films in it."""
    return mostly(name, DEMUXERS)


def load_video_folder(config: DataConfig) -> SampleSet:
    """A folder of films (the suffixes are those of `DEMUXERS`), one sub-folder a class where there are any.

    The headers of all files are read first. Clips that take no more than `config.memory_limit_gb` are decoded at once,
    others as training goes.

    Raises:
        DataError: none of the files can be read; a single clip beyond the memory limit.
        ConfigError: PyAV is not installed.
    """
    video = config.video
    optional_module("av", "reading films", EXTRA)
    files, class_names = class_files(Path(config.data), DEMUXERS)
    names = [str(file) for file, _ in files]

    def described(number: int) -> tuple[Film, list[Clip]]:
        film = probe(*files[number], config)
        return film, clips_of(film, config)

    found, broken = read_all(names, described, what="video files", workers=config.workers)
    films = [film for film, _ in found.values()]
    clips = [clip for _, parts in found.values() for clip in parts]
    size = video.video_size or films[0].size
    spec = SampleSpec(config.channels or 3, (video.frames, *size))
    shape = "x".join(map(str, spec.shape))
    per_clip = int(np.prod(spec.shape))
    if config.memory_limit_gb:
        check_fits(f"a clip of {shape}", per_clip, config, instead=SHORTER)
    modality = Video(fps=(video.video_fps or films[0].fps) / video.frame_stride, container=video.video_format)
    logger.info("%s: %d clips of %s from %d films", config.data, len(clips), shape, len(films))
    if len(clips) * per_clip > limit_bytes(config):
        logger.info("they are decoded as training goes, by %d workers", config.workers)

        def load(number: int) -> tuple[Tensor, int]:
            clip = clips[number]
            return read_clips([clip], size, config)[0], clip.film.label

        source = Source(len(clips), load, lambda i: str(clips[i].film.path), class_names, "clips")
        return StreamingSet(
            spec=spec,
            num_classes=len(class_names),
            class_names=class_names,
            modality=modality,
            broken=broken,
            source=source,
            workers=config.workers,
            prefetch=config.prefetch,
        )
    parts = list(found.values())
    read, damaged = read_all(
        [str(film.path) for film in films],
        lambda i: read_clips(parts[i][1], size, config),
        what="video files",
        workers=config.workers,
    )
    labels = torch.tensor([films[i].label for i, part in read.items() for _ in part])
    data = memory_set(torch.cat(list(read.values())), labels, config, class_names=class_names, broken=broken | damaged)
    return dataclasses.replace(data, modality=modality)
