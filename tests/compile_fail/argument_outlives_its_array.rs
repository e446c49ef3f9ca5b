//! What an array holds is lent for as long as the array is there.
use flashinfer_rs::object::Array;
use flashinfer_rs::Arg;

fn main() {
    let array = Array::from_items([1i64]).unwrap();
    let arg: Arg<'_> = array.as_args()[0];
    drop(array);
    println!("{arg:?}");
}
