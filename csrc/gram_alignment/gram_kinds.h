// What becomes of a difference d of two cosines; the twin of KINDS in op.py.
#pragma once

namespace layersync {

enum GramKind { kGramRelu = 0, kGramSquare = 1, kGramAbs = 2, kGramKinds = 3 };

}  // namespace layersync
