// Runs before the first paint, hence not a module: a chosen theme must not flash up as the other one.
{
  let theme = null;
  try {
    theme = localStorage.getItem("sse-trio-theme");
  } catch {
    // No storage for this page: the system's theme it is.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
