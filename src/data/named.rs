//! An ordered list of named things: the order of a definition's inputs and outputs is its interface.

/// Things by name, in the order in which they were put in. A name occurs once.
#[derive(Debug, Clone, PartialEq)]
pub struct Named<T>(Vec<(String, T)>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Named<T> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Of names that are known to be different: putting in many one by one would compare each with all.
    pub(crate) fn distinct(items: Vec<(String, T)>) -> Self {
        Self(items)
    }

    /// Puts one behind the others; one of the same name is replaced where it stands, and given back.
    pub fn insert(&mut self, name: impl Into<String>, value: T) -> Option<T> {
        let name = name.into();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, place)) => Some(std::mem::replace(place, value)),
            None => {
                self.0.push((name, value));
                None
            }
        }
    }

    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// The names and what they name, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &T)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The names, in order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// What they name, in order.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<N: Into<String>, T> FromIterator<(N, T)> for Named<T> {
    fn from_iter<I: IntoIterator<Item = (N, T)>>(items: I) -> Self {
        let mut named = Self::new();
        for (name, value) in items {
            named.insert(name, value);
        }
        named
    }
}

impl<N: Into<String>, T, const COUNT: usize> From<[(N, T); COUNT]> for Named<T> {
    fn from(items: [(N, T); COUNT]) -> Self {
        items.into_iter().collect()
    }
}
