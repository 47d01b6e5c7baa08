"""Video-LLaVA: its images are LLaVA-1.5's, with a tower of their own."""

from tokensieve.models.family import Family


class VideoLlava(Family):
    name = "video-llava"
    title = "Video-LLaVA (images)"
    model_types = ("video_llava",)
