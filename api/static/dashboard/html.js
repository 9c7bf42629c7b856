// Preact and htm, bound together. Templates make elements and text nodes only, so that no text can become HTML.

import htm from "../preact/htm.js";
import { Fragment, h, render } from "../preact/preact.js";

export * from "../preact/hooks.js";
export { Fragment, render };

export const html = htm.bind(h);
