"""LLaVA-NeXT-Video: its images are LLaVA-NeXT's."""

from tokensieve.models.llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    name = "llava-next-video"
    title = "LLaVA-NeXT-Video (images)"
    model_types = ("llava_next_video",)
