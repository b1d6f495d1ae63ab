//! The shelf that a URL means.

use crate::shelf::{DirectoryShelf, Shelf};
use std::fmt;
use std::path::PathBuf;

/// A shelf, and the one name that it has in records: two ways to write it are one.
pub struct Opened {
    /// The shelf.
    pub shelf: Box<dyn Shelf>,
    /// Its URL.
    pub name: String,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Opened").field(&self.name).finish()
    }
}

/// The shelf that a path, `file:///PATH`, or the URL of an object store means. Nothing is looked at.
///
/// # Errors
/// What is wrong with the URL, and how to write it.
pub fn open(url: &str) -> Result<Opened, String> {
    let path = match url.split_once("://") {
        None => url,
        Some(("file", path)) if path.starts_with('/') => path,
        Some(("file", _)) => {
            return Err(format!(
                "{url}: write a path of this machine as file:///PATH"
            ));
        }
        Some((scheme, _)) => return objects(url, scheme),
    };
    let absolute = std::path::absolute(path).map_err(|error| format!("find {path}: {error}"))?;
    // A slash at the end is no component.
    let absolute: PathBuf = absolute.components().collect();
    Ok(Opened {
        name: format!("file://{}", absolute.display()),
        shelf: Box::new(DirectoryShelf::new(&absolute)),
    })
}

#[cfg(feature = "objects")]
fn objects(url: &str, scheme: &str) -> Result<Opened, String> {
    match crate::objects::ObjectShelf::open(url) {
        None => Err(unknown(url, scheme)),
        Some(shelf) => {
            let shelf = shelf?;
            let name = shelf.place();
            let shelf = Box::new(shelf);
            Ok(Opened { shelf, name })
        }
    }
}

#[cfg(not(feature = "objects"))]
fn objects(url: &str, scheme: &str) -> Result<Opened, String> {
    if ["s3", "gs", "az", "abfs", "abfss"].contains(&scheme) {
        return Err(format!(
            "{url}: this outlive was built without object stores"
        ));
    }
    Err(unknown(url, scheme))
}

fn unknown(url: &str, scheme: &str) -> String {
    format!(
        "{url}: there is no {scheme}; a place is a path, file:///PATH, s3://BUCKET/PREFIX, \
         gs://BUCKET/PREFIX, or az://CONTAINER/PREFIX"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ways_to_write_a_directory_are_one() {
        for url in ["/a/b", "file:///a/b", "/a//b/"] {
            assert_eq!(open(url).unwrap().name, "file:///a/b");
        }
        for bad in ["file://a", "ftp://a/b", "http://a/b", "://a"] {
            assert!(open(bad).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[cfg(feature = "objects")]
    #[test]
    fn two_ways_to_write_a_bucket_are_one() {
        let same = ["s3://b/p/q", "s3://b/p/q/", "s3://b//p/q"];
        for url in same {
            let opened = open(url).unwrap();
            assert_eq!(
                (&*opened.name, &*opened.shelf.place()),
                ("s3://b/p/q", "s3://b/p/q")
            );
        }
        assert_eq!(open("s3://b").unwrap().name, open("s3://b/").unwrap().name);
        let bad = [
            "s3://",
            "s3:///p",
            "s3://b/p?x",
            "s3://k:s@b/p",
            "s3://k@b",
            "s3://b/../p",
            "gs://b/%2e",
        ];
        for url in bad {
            assert!(open(url).is_err(), "{url}");
        }
    }
}
