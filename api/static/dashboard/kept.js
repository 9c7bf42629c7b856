// What this tab keeps over a reload. A browser that stores nothing for sites, or no more than it has, keeps it until then.

const own = new Map();

export function kept(name) {
  try {
    return own.get(name) ?? sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

// `text` null: it is forgotten.
export function keep(name, text) {
  own.delete(name);
  try {
    sessionStorage.removeItem(name);
    if (text !== null) sessionStorage.setItem(name, text);
  } catch {
    if (text !== null) own.set(name, text);
  }
}
