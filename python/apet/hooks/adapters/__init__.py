"""One file for each model family; importing this registers them all."""

from ..adapter import register_adapter
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .qwen2_5_vl import Qwen2_5VL
from .qwen2_vl import Qwen2VL
from .qwen3_vl import Qwen3VL
from .video_llava import VideoLlava

register_adapter("internvl", InternVL())
register_adapter("llava", Llava())
register_adapter("llava_next", LlavaNext())
register_adapter("llava_next_video", LlavaNextVideo())
register_adapter("llava_onevision", LlavaOnevision())
register_adapter("qwen2_5_vl", Qwen2_5VL())
register_adapter("qwen2_vl", Qwen2VL())
register_adapter("qwen3_vl", Qwen3VL())
register_adapter("video_llava", VideoLlava())
