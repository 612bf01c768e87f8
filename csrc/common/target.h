// Compiles what stands between BEGIN and END for a newer instruction set than the rest of the extension. Standard and
// torch headers must be included before BEGIN: an inline function of theirs compiled for AVX-512 could be the copy that
// the linker keeps for everybody.
#pragma once

#define LAYERSYNC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LAYERSYNC_TARGET_BEGIN(isa) \
  LAYERSYNC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LAYERSYNC_TARGET_END LAYERSYNC_PRAGMA(clang attribute pop)
#else
#define LAYERSYNC_TARGET_BEGIN(isa) LAYERSYNC_PRAGMA(GCC push_options) LAYERSYNC_PRAGMA(GCC target(isa))
#define LAYERSYNC_TARGET_END LAYERSYNC_PRAGMA(GCC pop_options)
#endif
