"""One file for each model family; importing this registers them all."""

from ..adapter import register_adapter
from .llava import Llava
from .llava_next import LlavaNext
from .qwen2_5_vl import Qwen2_5VL
from .video_llava import VideoLlava

register_adapter("llava", Llava())
register_adapter("llava_next", LlavaNext())
register_adapter("qwen2_5_vl", Qwen2_5VL())
register_adapter("video_llava", VideoLlava())
